"""Commands: one typed function a file. The command line is made from their signatures."""
