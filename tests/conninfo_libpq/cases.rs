//! The strings that libpq is asked about, with the major version that first understands them as 18 does.
//!
//! `{dir}` is an empty directory, `{port}` the port of the server played.

/// Strings with a mistake. Hosts are local, for some mistakes are found only after connecting began.
pub(crate) const WRONG: &[(u32, &str)] = &[
    // The key/value form.
    (13, "foo=bar"),
    (13, "foo user=x"),
    (13, "user=x foo"),
    (13, "user=x foo bar=1"),
    (13, "=x"),
    (13, "user='abc"),
    (13, r"user='abc\"),
    (13, r"user='abc\'"),
    (13, "user=a\tb=c"),
    (13, "USER=x"),
    (13, "Host=x port=1"),
    (13, "user=x 'host'=y"),
    (13, "hostname=x"),
    (13, "username=x"),
    (13, "database=x"),
    (13, "primary_slot_name=x"),
    (13, "tty=x y"),
    (13, "application_name=a b"),
    // The URI form.
    (13, "postgresql://[::1"),
    (13, "postgresql://[]"),
    (13, "postgresql://[::1]x"),
    (13, "postgres://[::1]/x?y"),
    (13, "postgres://u@[::1,b"),
    (13, "postgres://a,[]:1"),
    (13, "postgresql://h?a=b=c"),
    (13, "postgresql://h?abc"),
    (13, "postgresql://h?&user=a"),
    (13, "postgresql://h?user=a&&port=1"),
    (13, "postgresql://h?foo=bar"),
    (13, "postgresql://h?Host=x"),
    (13, "postgresql://h?ssl=false"),
    (13, "postgresql://h?=x"),
    (13, "postgresql://h?x=%zz"),
    (13, "postgresql://h?%zz=x"),
    (13, "postgresql://%"),
    (13, "postgresql://h/%a"),
    (13, "postgresql://h/%g0"),
    (13, "postgresql://%00h"),
    (13, "postgresql://u%00@h"),
    (13, "postgresql://h:%zz/"),
    (13, "postgresql://h?user=%00"),
    (18, "postgresql://h/a b"),
    (18, "postgresql://a b/c"),
    (18, "postgresql://h?user=x y"),
    // Lists.
    (14, "host=a,b hostaddr=1.1.1.1"),
    (14, "host=a hostaddr=1.1.1.1,2.2.2.2"),
    (13, "host=a,b,c port=1,2"),
    (13, "host=a port=1,2"),
    (13, "port=1,2"),
    (13, "hostaddr=127.0.0.1,::1 port=1,2,3"),
    (13, "postgresql://a:1,b:2/?port=1,2,3"),
    // Numbers.
    (13, "host=127.0.0.1 port=x"),
    (13, "host=127.0.0.1 port=0"),
    (13, "host=127.0.0.1 port=65536"),
    (13, "host=127.0.0.1 port=-1"),
    (13, "host=127.0.0.1 port=1x"),
    (13, "host=127.0.0.1 port=0x10"),
    (13, "host=127.0.0.1 port=99999999999"),
    (13, "host=127.0.0.1 port=' '"),
    (13, "postgresql://127.0.0.1:x/"),
    (13, "postgresql://127.0.0.1:0/"),
    (14, "host=127.0.0.1 port=1 connect_timeout=x"),
    (14, "host=127.0.0.1 port=1 connect_timeout=''"),
    (14, "host=127.0.0.1 port=1 connect_timeout=1.5"),
    (14, "host=127.0.0.1 port=1 connect_timeout=1s"),
    (14, "host=127.0.0.1 port=1 keepalives=x"),
    (14, "host=127.0.0.1 port=1 keepalives=on"),
    (14, "host=127.0.0.1 port=1 keepalives_idle=x"),
    (14, "host=127.0.0.1 port=1 keepalives_interval=''"),
    (14, "host=127.0.0.1 port=1 keepalives_count=2147483648"),
    (14, "host=127.0.0.1 port=1 tcp_user_timeout=1s"),
    // Addresses.
    (13, "hostaddr=xx"),
    (13, "hostaddr=1.2.3.4.5"),
    (13, "hostaddr=[::1]"),
    (13, "hostaddr=localhost"),
    (13, "hostaddr=127.0.0.256"),
    (13, "hostaddr=127.08"),
    (13, "hostaddr=4294967296"),
    (13, "hostaddr=0x"),
    (13, "hostaddr=127."),
    (
        13,
        "host={dir}/0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890",
    ),
    // Closed lists of values.
    (13, "sslmode=x"),
    (13, "sslmode=''"),
    (13, "sslmode=Require"),
    (13, "sslmode=verify_full"),
    (13, "channel_binding=x"),
    (13, "channel_binding=''"),
    (13, "gssencmode=x"),
    (13, "gssencmode=''"),
    (13, "target_session_attrs=x"),
    (13, "target_session_attrs=''"),
    (13, "target_session_attrs=read_write"),
    (13, "target_session_attrs=master"),
    (13, "postgresql://h?target_session_attrs=slave"),
    (13, "postgresql://h?sslmode=true"),
    (17, "ssl_min_protocol_version=TLSv2"),
    (17, "ssl_max_protocol_version=1.2"),
    (13, "ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2"),
    (13, "ssl_max_protocol_version=TLSv1.1"),
    (16, "sslcertmode=x"),
    (16, "load_balance_hosts=x"),
    (16, "sslrootcert=system sslmode=require"),
    (16, "require_auth=x"),
    (16, "require_auth=md5,md5"),
    (16, "require_auth=md5,"),
    (16, "require_auth=md5,!none"),
    (16, "require_auth=!md5,none"),
    (16, "require_auth=!none,!none"),
    (17, "sslnegotiation=x"),
    (17, "sslnegotiation=direct"),
    (17, "sslnegotiation=direct sslmode=prefer"),
    (18, "min_protocol_version=3.1"),
    (18, "max_protocol_version=4"),
    (18, "min_protocol_version=3.2 max_protocol_version=3.0"),
    (18, "scram_client_key=%"),
    (18, "scram_client_key='QUJD '"),
    (18, "scram_client_key=QUI"),
    (18, "scram_client_key=''"),
    (18, "scram_client_key=QUJ="),
    (18, "scram_server_key=QUJD"),
    // Services.
    (13, "service=nowhere"),
    (13, "service=''"),
    (13, "postgresql:///?service=nowhere"),
];

/// Good strings; nobody listens there.
pub(crate) const PLACES: &[(u32, &str)] = &[
    (13, "host=127.0.0.1 port=1"),
    (13, "host=localhost port=1"),
    (13, "host=127.0.0.1,127.0.0.2,127.0.0.3 port=1"),
    (13, "host=127.0.0.1,127.0.0.2 port=1,2"),
    (13, "host={dir},127.0.0.2 port=,2"),
    (13, "host={dir} port=7"),
    (13, "host={dir},127.0.0.1 port=7,8"),
    (13, "host=127.0.0.1,{dir} port=7"),
    (13, "hostaddr=127.0.0.1 port=1"),
    (13, "hostaddr=127.1 port=1"),
    (13, "hostaddr=0x7f.0.010 port=1"),
    (13, "host=elsewhere hostaddr=127.0.0.1 port=1"),
    (13, "host=elsewhere,127.0.0.2 hostaddr=127.0.0.1, port=1"),
    (13, "host=@walrelay port=1"),
    (13, "port=59999"),
    (13, "host='' port=59999"),
    (13, "host=127.0.0.1, port=1,59999"),
    (13, "host=127.0.0.1 port=' 1 '"),
    (13, "host=127.0.0.1 port=+1"),
    (13, "host=127.0.0.1 port=01"),
    (13, "host = 127.0.0.1 port\t=\n1"),
    (13, r"host='127.0.\0.1' port=1"),
    (13, r"host=127.0.0.\1 port=1"),
    (13, "host=127.0.0.1 host=127.0.0.2 port=1"),
    (13, "user='a'host=127.0.0.1 port=1"),
    (13, "requiressl=0 host=127.0.0.1 port=1"),
    (13, "postgresql://127.0.0.1:1"),
    (13, "postgres://127.0.0.1:1/"),
    (13, "postgres://127.0.0.1:1,127.0.0.2:2,{dir}:3/db"),
    (13, "postgres://127.0.0.1,127.0.0.2/?port=4"),
    (13, "postgres://[::1]:1/"),
    (13, "postgres://[::1]:1,127.0.0.1:2?user=x"),
    (13, "postgres://:59999/"),
    (13, "postgres:///?host={dir}&port=5"),
    (13, "postgres:///db?host={dir},127.0.0.1&port=5,6"),
    (13, "postgres://127.0.0.9:1/db?host=127.0.0.1"),
    (13, "postgres://%31%32%37.0.0.1:1/"),
    (13, "postgres://127.0.0.1:%31/"),
    (13, "postgres://u:p?w@127.0.0.1:1"),
    (13, "postgres://u:a:b@127.0.0.1:1"),
    (13, "host={dir} port=7 keepalives=x tcp_user_timeout=y"),
    (13, "host=127.0.0.1 port=1 keepalives=0 keepalives_idle=x"),
    (
        13,
        "host=127.0.0.1 port=1 connect_timeout=' 5 ' keepalives_idle=-1 keepalives_count=3 tcp_user_timeout=+100",
    ),
    (
        13,
        "host=127.0.0.1 port=1 sslmode=verify-full sslcompression=0 sslsni=1 sslcert=a sslkey=b sslrootcert=c sslcrl=d",
    ),
    (
        13,
        "host=127.0.0.1 port=1 target_session_attrs=read-write channel_binding=prefer gssencmode=prefer krbsrvname=x",
    ),
    (14, "host=127.0.0.1 port=1 target_session_attrs=prefer-standby"),
    (14, "host=127.0.0.1 port=1 sslcrldir=x"),
    (13, "host=127.0.0.1 port=1 ssl_min_protocol_version=tlsv1 ssl_max_protocol_version=TLSV1.3"),
    (13, "host=127.0.0.1 port=1 ssl_min_protocol_version='' ssl_max_protocol_version=''"),
    (
        16,
        "host=127.0.0.1 port=1 require_auth=scram-sha-256,none sslcertmode=allow load_balance_hosts=disable",
    ),
    (
        18,
        "host=127.0.0.1 port=1 min_protocol_version=3.0 max_protocol_version=latest oauth_scope=x sslkeylogfile=y",
    ),
    (18, "postgres:// 127.0.0.1 :1/"),
];

/// A string, what surrounds it, and the version that first understands it.
pub(crate) struct Case {
    pub(crate) since: u32,
    pub(crate) text: &'static str,
    pub(crate) variables: &'static [(&'static str, &'static str)],
    /// `~/.pgpass`
    pub(crate) passwords: &'static str,
    /// `service.conf`
    pub(crate) services: &'static str,
}

const fn sent(text: &'static str) -> Case {
    Case { since: 13, text, variables: &[], passwords: "", services: "" }
}

const fn with_variables(text: &'static str, variables: &'static [(&'static str, &'static str)]) -> Case {
    Case { variables, ..sent(text) }
}

const fn with_passwords(text: &'static str, passwords: &'static str) -> Case {
    Case { passwords, ..sent(text) }
}

const fn with_services(text: &'static str, services: &'static str) -> Case {
    Case { services, variables: &[("PGSERVICEFILE", "{dir}/service.conf")], ..sent(text) }
}

const LOCAL: &str = "host=127.0.0.1 port={port} user=u dbname=d";

/// Strings for the server that is played here.
pub(crate) const SENT: &[Case] = &[
    sent("host=127.0.0.1 port={port}"),
    sent("host=127.0.0.1 port={port} user=u"),
    sent("host=127.0.0.1 port={port} user='' dbname=''"),
    sent(r"host=127.0.0.1 port={port} user='it\'s me' dbname=a\ b password='\\x y'"),
    sent("host={dir} port={port} user=u dbname=d password=p"),
    sent("hostaddr=127.0.0.1 host=elsewhere port={port} user=u password=p"),
    sent("host=127.0.0.1 port={port} user=u options='-c geqo=off' application_name='my app' password=p"),
    sent("host=127.0.0.1 port={port} user=u application_name=''"),
    sent("host=127.0.0.1 port={port} user=u replication=true dbname=replication password=p"),
    sent("host=127.0.0.1 port={port} user=u client_encoding=LATIN1"),
    sent("postgresql://u:p%40ss%2F@127.0.0.1:{port}/d%20b?application_name=x%26y&options=-c%20geqo%3Doff"),
    sent("postgresql://u:p:q?r@127.0.0.1:{port}"),
    sent("postgresql://@127.0.0.1:{port}/?user=other&password=%C3%A9"),
    sent("postgresql:///d?host={dir}&port={port}&user=u&password=p"),
    with_variables(
        "",
        &[
            ("PGHOST", "127.0.0.1"),
            ("PGPORT", "{port}"),
            ("PGUSER", "e"),
            ("PGDATABASE", "f"),
            ("PGPASSWORD", "g"),
            ("PGAPPNAME", "h"),
            ("PGOPTIONS", "-c geqo=on"),
            ("PGCLIENTENCODING", "UTF8"),
            ("PGTZ", "UTC"),
            ("PGDATESTYLE", "ISO"),
            ("PGGEQO", "default"),
        ],
    ),
    with_variables(
        "host={dir} user=u dbname=d password=own",
        &[("PGPORT", "{port}"), ("PGPASSWORD", "theirs"), ("PGUSER", "x")],
    ),
    with_variables("host=127.0.0.1 port={port} user=u password=''", &[("PGPASSWORD", "theirs")]),
    with_variables("postgresql://127.0.0.1:{port}/", &[("PGDATABASE", "f"), ("PGUSER", "e")]),
    with_variables("hostaddr=127.0.0.1", &[("PGHOST", "elsewhere"), ("PGPORT", "{port}")]),
    with_variables(LOCAL, &[("PGSSLMODE", "disable"), ("PGREQUIRESSL", "0"), ("PGCONNECT_TIMEOUT", "5")]),
    with_passwords(LOCAL, "127.0.0.1:{port}:d:u:hush\n"),
    with_passwords(LOCAL, "# comment\n\n*:1:*:*:no\n*:*:x:*:no\n*:*:*:x:no\n*:*:*:*:yes\n*:*:*:*:late\n"),
    with_passwords(LOCAL, "127.0.0.1:{port}:d:u:with\\:colon\\\\and:more\r\n"),
    with_passwords(LOCAL, "127.0.0.1:{port}:d:u:\n*:*:*:*:late\n"),
    with_passwords(LOCAL, "127.0.0.1:{port}:d:u\n"),
    with_passwords(LOCAL, "127.0.0.1:{port}:d:u:tail\\"),
    with_passwords("host=127.0.0.1 port={port} user='a:b\\\\c' dbname=d", "*:*:*:a\\:b\\\\c:escaped\n"),
    with_passwords("host=127.0.0.1 port={port} user=a:b dbname=d", "*:*:*:a:b:not escaped\n"),
    with_passwords("host={dir} port={port} user=u dbname=d", "localhost:*:*:*:no\n{dir}:{port}:d:u:socket\n"),
    with_passwords(
        "hostaddr=127.0.0.1 host=n port={port} user=u dbname=d",
        "127.0.0.1:*:*:*:no\nn:*:*:*:name\n",
    ),
    with_passwords("hostaddr=127.0.0.1 port={port} user=u dbname=d", "127.0.0.1:*:*:*:address\n"),
    with_passwords(
        "host=127.0.0.1 port=0{port} user=u dbname=d",
        "*:{port}:*:*:no\n*:0{port}:*:*:as written\n",
    ),
    with_passwords(
        "host=127.0.0.1 port={port} user=u dbname=replication replication=true",
        "*:*:replication:u:walreceiver's\n",
    ),
    with_passwords("host=127.0.0.1 port={port} user=u password=given", "*:*:*:*:file's\n"),
    with_passwords("host=127.0.0.1 port={port} user=u passfile={dir}/none", "*:*:*:*:no\n"),
    with_services("service=dc1", "[dc1]\nhost=127.0.0.1\nport={port}\nuser=s\npassword=p q \n"),
    with_services(
        "service=dc1 user=own",
        "[dc2]\nuser=no\n\n [dc1] \n# x\nhost=127.0.0.1\nport={port}\nuser=s\n[dc1]\nuser=no\n",
    ),
    with_services("postgresql:///d?service=dc1", "[dc1]\nhost={dir}\nport={port}\nuser=s\ndbname=no\n"),
    with_services("service=dc1", "[dc1]\nhost=127.0.0.1\nport={port}\noptions=-c a=b\nuser=\n"),
    with_services("host=127.0.0.1 port={port} user=u service=a", "[a]\n[b]\nuser=no\n"),
];

/// Random strings from pieces that are likely to matter.
pub(crate) struct Random(u64);

impl Random {
    /// From `WALRELAY_SEED`, else from the clock; says which.
    pub(crate) fn seeded() -> Self {
        let from_clock = || u64::from(std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos());
        let given = std::env::var("WALRELAY_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(from_clock);
        eprintln!("WALRELAY_SEED={seed}");
        Self(seed | 1)
    }

    /// A string of either form; hosts, if it gets so far, are local and closed.
    pub(crate) fn connection_string(&mut self, major: u32) -> String {
        if self.below(2) == 0 { self.key_values() } else { self.uri(major) }
    }

    fn key_values(&mut self) -> String {
        // A first "=" makes it a connection string to psql, which would take a mere word for a database.
        let mut text = String::from("connect_timeout=5 host=127.0.0.1 port=1");
        for _ in 0..self.below(5) + 1 {
            text.push_str(self.pick(&[" ", "  ", "\t", "\n", "", " "]));
            text.push_str(self.pick(&[
                "port",
                "user",
                "hostaddr",
                "options",
                "sslmode",
                "usr",
                "application_name",
                " host=/tmp ",
            ]));
            text.push_str(self.pick(&["=", "=", "=", "=", " = ", "= ", " =", ""]));
            for _ in 0..self.below(3) {
                text.push_str(self.pick(&[
                    "'",
                    "\\",
                    "\\'",
                    "'",
                    "1",
                    "7",
                    "127.0.0.1",
                    "disable",
                    ",",
                    "a b",
                    "=",
                ]));
            }
        }
        text
    }

    fn uri(&mut self, major: u32) -> String {
        let mut text =
            String::from(self.pick(&["postgres://", "postgresql://", "postgres://u@", "postgres://u:p@"]));
        text.push_str(self.pick(&[
            "127.0.0.1",
            "127.0.0.1:1",
            "[::1]",
            "%2Ftmp",
            "",
            "[::1",
            "127.0.0.1,127.0.0.2:",
        ]));
        for _ in 0..self.below(6) {
            // Before 18 spaces were taken as they are.
            let space = if major >= 18 { " " } else { "" };
            let pieces = [
                ":",
                "@",
                "/",
                "?",
                "&",
                "=",
                ",",
                "[",
                "]",
                ",[::1]",
                ",127.0.0.1",
                ":1",
                ":7",
                "/%31",
                "%",
                "%0",
                "?port=1",
                "&user=x",
                "&port=2,3",
                "?host=127.0.0.1",
                "?sslmode=disable",
                ",127.0.0.2:2",
                space,
            ];
            text.push_str(self.pick(&pieces));
        }
        text
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }

    /// xorshift64
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}
