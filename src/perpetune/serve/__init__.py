"""A state as a web service: pictures in, names and probabilities out, while other processes go on with the state.

The modules import FastAPI, uvicorn and prometheus_client, which the extra `serve` installs. This file imports nothing,
so that `import perpetune.serve` works without them.
"""
