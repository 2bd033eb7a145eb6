"""A real authorization server: django-oauth-toolkit in a small Django project, with rotation and reuse protection.

    python authorization_server.py FOLDER USERS

prints its port, the client's id and secret, and a refresh token for every user, as one line of JSON; then it serves.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from socketserver import ThreadingMixIn
from uuid import uuid4
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import django
from django.conf import settings

CLIENT_SECRET = "a secret: 50% + more/of=it"


def configure(folder: Path) -> None:
    settings.configure(
        SECRET_KEY="not a secret",
        ALLOWED_HOSTS=["*"],
        USE_TZ=True,
        ROOT_URLCONF=__name__,
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "oauth2_provider"],
        # The tables as they are now, and not their history step by step.
        MIGRATION_MODULES=dict.fromkeys(["auth", "contenttypes", "oauth2_provider"]),
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(folder / "provider.sqlite"),
                "OPTIONS": {"timeout": 30, "transaction_mode": "IMMEDIATE"},
            }
        },
        PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        OAUTH2_PROVIDER={
            "ROTATE_REFRESH_TOKEN": True,
            "REFRESH_TOKEN_REUSE_PROTECTION": True,
            "REFRESH_TOKEN_GRACE_PERIOD_SECONDS": 0,
            "ACCESS_TOKEN_EXPIRE_SECONDS": 3600,
        },
    )
    django.setup()


def fill(users: int) -> dict[str, object]:
    from django.contrib.auth.models import User
    from django.utils import timezone
    from oauth2_provider.models import AccessToken, Application, RefreshToken

    User.objects.bulk_create(User(username=f"user{number}") for number in range(users))
    application = Application(
        name="Cat Feeder",
        client_id="cats:and dogs",
        client_secret=CLIENT_SECRET,
        client_type="confidential",
        authorization_grant_type="authorization-code",
        redirect_uris="https://cats.example.org/callback",
    )
    application.save()
    end = timezone.now() + timedelta(hours=1)
    tokens = {}
    for user in User.objects.all():
        access = AccessToken.objects.create(
            user=user, application=application, token=f"access-{uuid4()}", expires=end, scope="read"
        )
        # Without a family a row made by hand escapes the reuse protection.
        refresh = RefreshToken.objects.create(
            user=user,
            application=application,
            token=f"refresh-{uuid4()}",
            access_token=access,
            token_family=uuid4(),
        )
        tokens[user.username] = refresh.token
    return {"client_id": application.client_id, "client_secret": CLIENT_SECRET, "tokens": tokens}


def records() -> dict[str, list[str]]:
    """The refresh tokens of every user that are good for something."""
    from oauth2_provider.models import RefreshToken

    good: dict[str, list[str]] = {}
    for name, token in RefreshToken.objects.filter(revoked=None).values_list("user__username", "token"):
        good.setdefault(name, []).append(token)
    return good


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def urls() -> list[object]:
    from django.http import HttpRequest, JsonResponse
    from django.urls import path
    from oauth2_provider.views import TokenView

    def tell(_: HttpRequest) -> JsonResponse:
        return JsonResponse(records())

    return [path("o/token/", TokenView.as_view()), path("records", tell)]


def main() -> None:
    configure(Path(sys.argv[1]))
    from django.core.management import call_command
    from django.db import transaction

    call_command("migrate", run_syncdb=True, verbosity=0)
    with transaction.atomic():
        filled = fill(int(sys.argv[2]))
    sys.modules[__name__].urlpatterns = urls()  # type: ignore[attr-defined]
    from django.core.wsgi import get_wsgi_application

    with make_server("127.0.0.1", 0, get_wsgi_application(), Server, Quiet) as server:
        print(json.dumps({"port": server.server_port, **filled}), flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
