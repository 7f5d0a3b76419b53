"""How near a picture is to a training picture, one file a measure."""
