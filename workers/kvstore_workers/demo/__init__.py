"""`kvstore demo`: tenants, documents and turns over two workers, four tiers and one crash."""
