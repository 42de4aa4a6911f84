"""Long work, batch by batch, so that a job that was killed goes on: sampling, restoring, interpolating between frames, and the
files that images go to."""
