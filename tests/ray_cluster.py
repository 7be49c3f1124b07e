"""A Ray cluster of several nodes on this machine, as a process: `python -m tests.ray_cluster`.

Each line on stdin, `join` or `leave PID`, is answered by one line: the pid of the raylet of the node that joined or left.
The first line on stdout holds the address and the head's raylet. The end of stdin ends the cluster.
"""

import subprocess
import sys
import threading
import time
from typing import Any

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 150 * 2**20, "node_ip_address": "127.0.0.1"}


def reap(raylets: dict[int, subprocess.Popen[bytes]]) -> None:
    """Collect raylets that died, as init does on a real node: to its workers one that is a zombie is alive, and they stay."""
    while True:
        for process in list(raylets.values()):
            process.poll()
        time.sleep(0.5)


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    nodes: dict[int, Any] = {}
    raylets: dict[int, subprocess.Popen[bytes]] = {}
    threading.Thread(target=reap, args=(raylets,), daemon=True).start()

    def tell(node: Any, *words: object) -> None:
        raylet = node.all_processes["raylet"][0].process
        nodes[raylet.pid], raylets[raylet.pid] = node, raylet
        print(*words, raylet.pid, flush=True)

    tell(cluster.head_node, cluster.address)
    for line in sys.stdin:
        verb, *pid = line.split()
        if verb == "join":
            tell(cluster.add_node(**NODE))
        else:
            cluster.remove_node(nodes[int(pid[0])], allow_graceful=False)
            print(*pid, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
