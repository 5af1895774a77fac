"""What an auditor reads: the certificate, its offline verification, the page and its figures."""
