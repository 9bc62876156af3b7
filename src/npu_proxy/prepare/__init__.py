"""What is done once, ahead of serving: an int8 copy of a model, the fastest settings of a machine, compiled blobs."""
