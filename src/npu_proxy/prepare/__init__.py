"""Work done once before serving: graph files, int8 copies, and the fastest settings for a machine."""
