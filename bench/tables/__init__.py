"""The tables of docs/quality.md: what is asked, of which configurations, and what comes of it."""
