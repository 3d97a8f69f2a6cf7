"""The peers of `gateway`, as their users write them, each after its own tutorial.

    python -m benchmarks.gateway_peers.fastapi_peer PORT

All serve the same MLP in torch: {"inputs": [100 numbers]} → {"output": number}. Nothing of ours is
used.
"""
