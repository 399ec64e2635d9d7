"""``python -m benchmarks.peers [name ...]``: make the environments of the peers."""

from benchmarks.peers.install import main

main()
