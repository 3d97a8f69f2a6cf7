"""Ground floor: what any process on the cluster may import.

Importing this package loads no torch, ray or mlflow. `jobs` and `serve_apps` stand on it and never
touch each other.
"""
