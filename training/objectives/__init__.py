"""One pretext task a file: what it trains and how it scores a batch."""
