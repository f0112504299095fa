"""How fast blocks move on each path, beside the floor of the same run: what the machine allows.

`python -m benchmarks.dataplane --help` says how to ask for it. From question to answer:

    command, options       what was asked for
    plan                   which cells that makes; goals
    measure                cells to samples: path and floor in turn
    stage, child           the processes that one block size needs
    mover, sampler, ring   a client process, its clock and its memory
    ways                   all that can be put on the clock, by name
    memcpy, raw_socket, bare_grpc, raw_file, raw_resp, floor_server      the floors
    through_client, through_disk, through_redis                          our own paths
    row, report            medians; table, picture, JSON
"""
