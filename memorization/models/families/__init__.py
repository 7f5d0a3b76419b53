"""What the guard has to know of a family of pipelines, one file a family."""
