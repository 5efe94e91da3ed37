//! How the server sees us, beside the stream.
//!
//! Owns the questions that the stream cannot ask: whether the primary waits for this relay, whether somebody else uses its
//! name, and whether the WAL of a relay before us comes from ourselves. Each look is a connection of its own that ends at once,
//! for a primary's smart shutdown waits for sessions. Never disturbs the stream, but for ending it where it is a loop.

use std::time::Duration;

use tokio::{sync::watch, time::timeout};

use crate::conninfo::{Conninfo, ProcessSurroundings};
use crate::protocol::SqlState;
use crate::protocol::instances::{Instances, PARAMETER};
use crate::status::UpstreamStatus;
use crate::upstream::dial::log_in;
use crate::upstream::dialog::Introduction;
use crate::upstream::seen::{Found, Namesakes, View, is_waited_for};
use crate::upstream::synchronous::Expectation;
use crate::upstream::{Opened, Upstream, UpstreamError};

/// One server, looked at as long as this is polled.
pub(super) struct Looking {
    /// For SQL; for replication where the server is a relay.
    conninfo: Conninfo,
    host: String,
    /// The server's process for our stream.
    pid: Option<u32>,
    is_relay: bool,
    expectation: Expectation,
    instances: watch::Sender<Instances>,
    status: watch::Sender<UpstreamStatus>,
    namesakes: Namesakes,
    looks: u64,
    /// Looks in a row that came to nothing, whoever is to blame.
    failures: u32,
    /// Whether it was said that nothing can be seen.
    is_blindness_told: bool,
}

impl Upstream {
    /// What is asked while the stream runs. Comes back only when it must not go on.
    pub(super) fn look_beside(&self, opened: &Opened) -> impl Future<Output = UpstreamError> + use<> {
        let is_relay = opened.introduction.parameters.contains_key(PARAMETER);
        let mut conninfo =
            if is_relay { self.settings.conninfo.clone() } else { self.settings.sql_conninfo.clone() };
        let name = conninfo.application_name.as_deref().unwrap_or("walrelay");
        conninfo.application_name = Some(format!("{name}{NAME_SUFFIX}"));
        let looking = Looking {
            conninfo,
            host: opened.host.clone(),
            pid: opened.introduction.process_id,
            is_relay,
            expectation: self.expectation(),
            instances: self.instances.clone(),
            status: self.status.clone(),
            namesakes: Namesakes::default(),
            looks: 0,
            failures: 0,
            is_blindness_told: false,
        };
        looking.run()
    }
}

impl Looking {
    async fn run(mut self) -> UpstreamError {
        // Until it has reported something, nobody waits for a standby.
        let mut pause = FIRST_LOOK_DELAY;
        loop {
            tokio::time::sleep(pause).await;
            self.looks += 1;
            let looked = timeout(LOOK_TIME_MAX, self.look()).await;
            pause = match looked.unwrap_or(Err(UpstreamError::OpeningTimeout)) {
                Ok(Some(view)) => self.take_in(view),
                Ok(None) if self.is_relay => {
                    self.failures = 0;
                    self.expectation.judge(None);
                    LOOK_INTERVAL
                }
                Ok(None) => {
                    let (host, process_id) = (self.host.clone(), self.pid.unwrap_or_default());
                    self.note_failure(&UpstreamError::OtherServer { host, process_id })
                }
                Err(error @ UpstreamError::Loop { .. }) => return error,
                Err(error) if is_refusal(&error) => {
                    self.tell_blind(&error.chain());
                    REFUSED_LOOK_INTERVAL
                }
                Err(error) => self.note_failure(&error),
            };
        }
    }

    /// The server may be busy: what was seen last stands until it is looked at once more, and no longer.
    fn note_failure(&mut self, error: &UpstreamError) -> Duration {
        tracing::debug!(error = %error.chain(), "could not ask the upstream how it sees this relay");
        self.failures = self.failures.saturating_add(1);
        if self.failures < FAILURES_MAX {
            return SECOND_LOOK_DELAY;
        }
        if self.is_relay {
            // Nothing would be told anyway.
            self.expectation.judge(None);
        } else {
            self.tell_blind(&error.chain());
        }
        LOOK_INTERVAL
    }

    async fn look(&self) -> Result<Option<View>, UpstreamError> {
        let mut conninfo = self.conninfo.clone();
        conninfo.reread_passwords(&ProcessSurroundings);
        let host = conninfo.hosts.iter().find(|host| host.to_string() == self.host);
        let mut dialog = log_in(&conninfo, host.ok_or(UpstreamError::NoHost)?).await?;
        let heard = hear_instances(&dialog.introduction, &self.instances, &self.host);
        let seen = match (self.pid, self.is_relay) {
            (Some(pid), false) => dialog.query_text(&View::query(pid)).await.map(|rows| View::of(&rows)),
            _ => Ok(None),
        };
        dialog.terminate().await;
        heard.and(seen)
    }

    /// What was seen, and when to look again.
    fn take_in(&mut self, view: View) -> Duration {
        self.failures = 0;
        if view.sync_state.is_none() {
            self.tell_blind("the user may not see it: grant pg_read_all_stats or pg_monitor");
            return LOOK_INTERVAL;
        }
        self.is_blindness_told = false;
        let found = self.namesakes.update(&view.others);
        let is_too_early = view.is_catching_up && self.looks == 1;
        if !is_too_early {
            self.expectation.judge(view.sync_state.as_deref());
        }
        self.tell(view.sync_state, found);
        if found.is_new || is_too_early { SECOND_LOOK_DELAY } else { LOOK_INTERVAL }
    }

    fn tell(&self, sync_state: Option<String>, found: Found) {
        let (state_before, namesakes_before) = {
            let status = self.status.borrow();
            (status.sync_state.clone(), status.namesakes.unwrap_or(0))
        };
        let namesakes = found.count(namesakes_before);
        if namesakes > namesakes_before {
            tracing::warn!(
                namesakes,
                "others report to the upstream under this relay's application_name: where synchronous_standby_names has it, \
                 commits may be confirmed by what they say"
            );
        }
        if state_before != sync_state {
            let shown = sync_state.as_deref().unwrap_or("not told");
            if is_waited_for(state_before.as_deref()) && !is_waited_for(sync_state.as_deref()) {
                tracing::warn!(sync_state = shown, "the upstream does not wait for this relay any more");
            } else {
                tracing::info!(sync_state = shown, "how the upstream sees this relay");
            }
        }
        self.status.send_modify(|status| {
            (status.sync_state, status.namesakes) = (sync_state, Some(namesakes));
        });
    }

    /// Nothing is known then, and nothing is made up. Once is enough.
    fn tell_blind(&mut self, why: &str) {
        if !std::mem::replace(&mut self.is_blindness_told, true) {
            tracing::warn!(
                why,
                "cannot check whether the upstream waits for this relay, nor who else reports under its application_name"
            );
        }
        self.status.send_modify(|status| (status.sync_state, status.namesakes) = (None, None));
        self.expectation.judge(None);
    }
}

/// Whether the server has said that we may not, or not there; asking again soon would only fill its log.
fn is_refusal(error: &UpstreamError) -> bool {
    match error {
        UpstreamError::Server(error) => [
            SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
            SqlState::INVALID_PASSWORD,
            SqlState::INVALID_CATALOG_NAME,
            SqlState::INSUFFICIENT_PRIVILEGE,
            SqlState::FEATURE_NOT_SUPPORTED,
        ]
        .into_iter()
        .any(|code| error.is(code)),
        UpstreamError::NoPassword | UpstreamError::Scram(_) | UpstreamError::Conninfo(_) => true,
        _ => false,
    }
}

/// Takes over what a server says of the relays before us, where it is one itself; that we are one of them is an error.
pub(super) fn hear_instances(
    introduction: &Introduction,
    instances: &watch::Sender<Instances>,
    host: &str,
) -> Result<(), UpstreamError> {
    let own = instances.borrow().clone();
    check_loop(introduction, &own, host)?;
    let now = own.behind(&heard(introduction));
    instances.send_if_modified(|instances| std::mem::replace(instances, now.clone()) != now);
    Ok(())
}

/// Refuses a server whose WAL comes from here.
pub(super) fn check_loop(
    introduction: &Introduction,
    own: &Instances,
    host: &str,
) -> Result<(), UpstreamError> {
    match own.place_in(&heard(introduction)) {
        Some(relays) => Err(UpstreamError::Loop { host: host.to_owned(), relays }),
        None => Ok(()),
    }
}

fn heard(introduction: &Introduction) -> Instances {
    introduction.parameters.get(PARAMETER).map_or_else(Instances::default, |text| Instances::parse(text))
}

/// Appended to the application name: nobody is to wait for this.
const NAME_SUFFIX: &str = "_look";

/// Time from the begin of a stream to the first look.
pub(super) const FIRST_LOOK_DELAY: Duration = Duration::from_secs(2);

/// How often the server is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// Time after which whoever is alive has reported again, with `wal_receiver_status_interval` at its default.
const SECOND_LOOK_DELAY: Duration = Duration::from_secs(11);

/// The same where it does not let us: each attempt is a line in its log.
const REFUSED_LOOK_INTERVAL: Duration = Duration::from_secs(600);

/// Failures in a row after which nothing is known any more.
const FAILURES_MAX: u32 = 2;

/// Longest time for one look.
const LOOK_TIME_MAX: Duration = Duration::from_secs(30);
