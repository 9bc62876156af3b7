"""Devices that compute batches. Their errors leave this package only as DeviceError."""
