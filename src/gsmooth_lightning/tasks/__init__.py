"""The commands of `gsmooth`."""
