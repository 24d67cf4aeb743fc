"""The built-in simulator: batched ray casting on Warp."""
