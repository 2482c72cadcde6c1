"""What tests share: a server to talk to, a reference model, random-weight models."""
