"""Long jobs in batches, which continue after being killed: sampling, restoration, frame interpolation, and their output
files."""
