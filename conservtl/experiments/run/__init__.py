"""One run from a spec: data, source model, adaptation, scores, saved model."""
