"""The main job on real data: digits learnt in the studio, recognised on phone photographs without labels for them."""
