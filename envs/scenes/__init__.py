"""The embedded world: scenes of coloured shapes with a ground truth, from grammar to detector."""
