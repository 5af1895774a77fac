"""What outsiders check a home by: proofs, cosignatures, exports and inspection of its log."""
