"""The command line: each command is a short function over the library."""
