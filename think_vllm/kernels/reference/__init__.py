"""The truth in plain torch: what every kernel is compared with. Obvious, not fast."""
