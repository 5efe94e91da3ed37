//! Who may report for the standbys that are waited for.
//!
//! Owns the checks between the policy, the users that are bound to its names, and the users file. What a standby reports
//! decides which commits are confirmed: a name that is spelled wrong must not open it to every user.

use std::collections::BTreeMap;

use crate::access::Users;
use crate::config::error::Problem;
use crate::protocol::acknowledge_policy::{AcknowledgePolicy, Member};

const POLICY: &str = "upstream.acknowledge";
const BOUND: &str = "upstream.acknowledge_users";

/// Refuses names and users that nobody has, and, where users prove who they are, names that everybody may use. `*` stands
/// for whoever was let in. Without a policy nobody is waited for, and nothing is refused.
pub(super) fn check(
    policy: &AcknowledgePolicy,
    bound: &BTreeMap<String, String>,
    users: Option<&Users>,
) -> Result<(), Problem> {
    let AcknowledgePolicy::Remote(remote) = policy else { return Ok(()) };
    for (at, (name, user)) in bound.iter().enumerate() {
        let wrong = |advice: String| Err(Problem::invalid(BOUND, name, advice));
        if remote.priority(name).is_none() {
            return wrong(format!("there is no such name in {POLICY}: {policy}"));
        }
        if bound.keys().take(at).any(|earlier| earlier.eq_ignore_ascii_case(name)) {
            return wrong("the name is there twice; case does not matter".to_owned());
        }
        if users.is_some_and(|users| users.user(user).is_none()) {
            return wrong(format!("user \"{user}\" is not in the file of downstream.users"));
        }
    }
    let is_bound = |wanted: &str| bound.keys().any(|name| name.eq_ignore_ascii_case(wanted));
    let unbound = remote.members.iter().find_map(|member| match member {
        Member::Named(name) if !is_bound(name) => Some(name),
        Member::Named(_) | Member::Everybody => None,
    });
    match unbound.filter(|_| users.is_some()) {
        Some(name) => {
            let advice =
                format!("no user is bound to it in {BOUND}, so that every user could report under that name");
            Err(Problem::invalid(POLICY, name, advice))
        }
        None => Ok(()),
    }
}
