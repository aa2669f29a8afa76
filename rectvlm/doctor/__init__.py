"""What this machine has and lacks for training and prediction, and what to do about each."""
