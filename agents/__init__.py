"""How an image is drawn and how drawing is learnt: flow policies, samplers and algorithms."""
