"""How a client on the node's host says hello at its unix socket, and how long messages are.

The client sends the ticket that `Attach` gave it; the node answers one byte, WELCOME or not, and
the size of the arena, with the arena's file beside them. From then on each side sends messages
behind their length.
"""

import struct

TICKET_BYTES = 32
WELCOME = 1
REFUSED = 0
HELLO = struct.Struct("<BQ")
"""Of the node: WELCOME or REFUSED, and the arena's size in bytes."""
LENGTH = struct.Struct("<I")
