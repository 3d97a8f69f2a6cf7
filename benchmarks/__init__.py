"""Side-by-side measurements against named peers: `make bench NAME=package_verify`."""
