"""The models of one server: those in memory, those that can be loaded, and how clients see both."""
