"""Why a request went as it did."""
