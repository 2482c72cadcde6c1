"""The block manager: which KV blocks of a request the scheduler may reuse."""
