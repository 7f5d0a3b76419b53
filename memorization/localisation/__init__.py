"""Where in a generated picture a training image is copied: maps, one file a method."""
