"""What tests share: tiny models, oracles, hand-made reports, tolerances."""
