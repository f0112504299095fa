"""The plug-in that lets vLLM know the connector by its bare name."""

NAME = "KVStoreConnector"


def register() -> None:
    """Called by vLLM in each of its processes, more than once in some. Imports no connector."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(NAME, "kvstore_client.vllm.connector", NAME)
    except ValueError:
        return  # It is registered.
