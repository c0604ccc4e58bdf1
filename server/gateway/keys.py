"""Who may take part in a federation, and its certificates:  anther keys COMMAND

    init [--host NAME …] [--port P]     make certificates, for these names and addresses of this server
    ticket --holder WHO [--days 7]      print what one device needs to come in; it works once
    list                                all devices and open tickets
    revoke DEVICE|TICKET                shut a device out, or void a ticket, at once, also while the server runs
    rotate [--host NAME …]              a new key and certificate for the server, which shows them at once

Devices trust the federation's own authority, whose key is FOLDER/authority.key: keep a copy elsewhere. Whoever has it
can pose as this server, and without it certificates can't be renewed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from common.errors import REPORTED_ERRORS, AntherError, told
from conf.schemas.server import ServerConfig
from protocol.ticket import Ticket
from server.gateway import pki
from server.gateway.device_registry import DeviceRegistry, ticket_name
from server.supervisor import server_dir
from server.supervisor.server_dir import ServerDir

DONE, USAGE = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: USAGE with one line on standard error where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="anther keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("init", "ticket", "list", "revoke", "rotate"))
    parser.add_argument("device", nargs="?", help="with revoke: its name, or an open ticket's, as in the list")
    parser.add_argument("--folder", help="the federation's folder (server.folder; default: in ANTHER_HOME)")
    parser.add_argument("--host", nargs="+", default=[], help="names and addresses that devices reach this server by")
    parser.add_argument("--port", type=int, default=ServerConfig.port)
    parser.add_argument("--holder", help="with ticket: whose device it is for")
    parser.add_argument("--days", type=float, default=7.0, help="with ticket: how long it is good for")
    asked = parser.parse_args(arguments)
    try:
        print(_act(server_dir.of(asked.folder), asked))
    except REPORTED_ERRORS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return USAGE
    return DONE


def _act(here: ServerDir, asked: argparse.Namespace) -> str:
    if asked.command == "init":
        here.prepare(asked.host, asked.port)
        hosts = ", ".join(pki.hosts_of(here.certificates.certificate.read_bytes()))
        return f"{here.folder}: certificates for {hosts}. Keep a copy of authority.key elsewhere."
    register = DeviceRegistry(here.folder, per_holder=here.address().per_holder)
    match asked.command:
        case "ticket":
            if not asked.holder:
                raise AntherError("ticket: say --holder, whose device it is for: so many devices each holder may have")
            return ticket(here, register, asked.holder, asked.days)
        case "list":
            return listed(register)
        case "revoke":
            if not asked.device:
                raise AntherError("revoke: say which device or ticket; anther keys list shows all")
            was_in = any(member.name == asked.device for member in register.look().active_devices().values())
            register.revoke(asked.device)
            if not was_in:
                return f"{asked.device} lets nobody in any more."
            return f"{asked.device} is shut out from now on. What it shared before stays in the adapter."
        case _:
            here.rotate(asked.host)
            return "a new certificate is there, and a server that runs shows it at once. Devices need nothing."


def ticket(here: ServerDir, register: DeviceRegistry, holder: str, days: float) -> str:
    """What one device needs to come in."""
    if not days > 0:
        raise AntherError(f"--days {days:g}: must be over 0")
    address = here.address()
    host = f"[{address.host}]" if ":" in address.host else address.host
    return str(Ticket(f"{host}:{address.port}", register.issue(holder, days=days), here.fingerprint()))


def listed(register: DeviceRegistry) -> str:
    """A line for each device and each open ticket."""
    found, now = register.look(), datetime.now(UTC).isoformat()
    lines = [
        f"{member.name}  of {member.holder}, since {member.since[:16]}"
        + (f", REVOKED {member.revoked[:16]}" if member.revoked else "")
        for member in found.members.values()
    ]
    lines += [
        f"{ticket_name(hashed)}  open, of {ticket.holder}, until {ticket.expires[:16]}"
        for hashed, ticket in found.tickets.items()
        if ticket.used_by is None and ticket.expires > now
    ]
    return "\n".join(lines) or "no devices, and no open tickets"


if __name__ == "__main__":
    sys.exit(main())
