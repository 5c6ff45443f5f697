"""Scores on the tasks that people publish figures on; a task never knows that a model is compressed."""
