"""What a training would see of a data set: figures, and a sheet of its images."""
