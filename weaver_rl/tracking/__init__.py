"""Tracking services that are told what a run's metrics are, besides its folder. They know no Ray and no controller."""
