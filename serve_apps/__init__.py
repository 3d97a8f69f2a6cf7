"""What stays up: the Ray Serve applications (gateway, language models, predictors, releases)."""
