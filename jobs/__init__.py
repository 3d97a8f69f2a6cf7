"""What is submitted to the cluster: one verb per file, each ends by itself.

Every job runs as `python -m jobs.VERB --config FILE [--set path=value …] [--check]`.
"""
