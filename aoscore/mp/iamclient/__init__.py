"""Our own certificates from the local IAM, and a gateway's RegisterNode at the main IAM."""
