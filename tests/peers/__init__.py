"""Agreement with independent code: one module a peer, each test one contract. `python -m tests.peers` counts them."""
