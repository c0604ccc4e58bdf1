"""The privacy ledger of a device: reserved → sealed → sent."""
