// Wide tables scroll inside their page: by keyboard as well.
addEventListener("load", () => document.querySelectorAll(".md-typeset__scrollwrap").forEach((e) => (e.tabIndex = 0)));
