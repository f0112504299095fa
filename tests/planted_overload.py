"""The throttled node with a planted bug: it takes every call, and every tier takes everything."""

from kvstore.admission import Admission
from kvstore.tiers.window import Window


def main() -> None:
    """The node, without any bound."""
    from benchmarks.service import throttled_node

    setattr(Window, "admits", lambda self, size: True)  # noqa: B010 - planted
    for bound in ("_room_for", "_client_allows"):
        setattr(Admission, bound, lambda self, *what: True)
    throttled_node.main()


if __name__ == "__main__":
    main()
