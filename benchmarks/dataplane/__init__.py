"""How fast blocks move on each path, beside the floor of the same run: what the machine allows.

`python -m benchmarks.dataplane --help` says how to ask for it.

    command   what was asked for             plan     which cells that makes
    measure   cells to rows                  stage    the processes that one block size needs
    mover     a client process               sampler  calls on the clock
    memcpy, raw_socket, bare_grpc, raw_file, raw_resp       the floors
    through_client, through_disk, through_redis             our own paths
    floor_server  the other end of socket and grpc          report   table, picture, JSON
"""
