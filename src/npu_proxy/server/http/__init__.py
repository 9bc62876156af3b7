"""The application: routes, request handling, authentication, and limits on connections."""
