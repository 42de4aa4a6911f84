"""What the commands do batch by batch, so that a job that was killed goes on: images sampled, restored or put between frames,
and the files that they go to."""
