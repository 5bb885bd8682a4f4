"""Tuning of one optimizer on one's own data: plan -> study of trials -> preset and report."""
